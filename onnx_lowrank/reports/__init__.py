"""Results as files that people read: a page, Markdown, CSV, and JSON; from typed results alone."""
