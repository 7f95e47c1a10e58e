"""What the reports for people have in common: a page, its numbers and colours, figures and pictures."""
