"""The error-budget report: one JSON document, of which terminal and HTML page are views (docs/report.md)."""
