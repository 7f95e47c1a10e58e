"""The report of an evaluation for people: one page that needs no other file."""

from service.evaluation_report.page import render, write_page

__all__ = ["render", "write_page"]
