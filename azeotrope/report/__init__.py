"""Statistics, tables, summary, figures and the report page."""
