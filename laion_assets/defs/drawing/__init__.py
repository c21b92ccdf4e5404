"""What the UI shows of a table: charts, contact sheets, links."""
