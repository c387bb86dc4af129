"""The report page: one file with the verdict, answers before and after, pictures, and how the adapter was made."""

from jcrosslora.report.page.contents import Contents, contents_of, find_contents
from jcrosslora.report.page.evaluation import Roles
from jcrosslora.report.page.html import report_page
from jcrosslora.report.page.sheet import report_sheet

__all__ = ["Contents", "Roles", "contents_of", "find_contents", "report_page", "report_sheet"]
