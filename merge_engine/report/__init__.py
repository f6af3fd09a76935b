"""What people read: model cards, and colours of charts."""
