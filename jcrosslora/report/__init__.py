"""What is said of a transfer: records, tables, the verdict, the model card, and descriptions of what a path holds."""
