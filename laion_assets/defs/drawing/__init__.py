"""Drawings of a table in the UI: funnels, charts, contact sheets, links."""
