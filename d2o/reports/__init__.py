"""What people look at: tables, charts, report.html, CSV and LaTeX."""
