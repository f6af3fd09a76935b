"""File formats: adapters as PEFT saves them, and full models as transformers does."""
