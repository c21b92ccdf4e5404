"""What the UI shows of a table besides numbers: funnels, charts, contact sheets, links."""
