"""What people read: model cards, colours of charts, text in columns."""
