"""The additive recurrence where nothing records: every product into memory that is there already."""
