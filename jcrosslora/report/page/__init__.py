"""The report page: one file with the verdict, answers before and after, pictures, and how the adapter was made."""

from jcrosslora.report.page.charts import report_sheet as report_sheet
from jcrosslora.report.page.contents import Roles as Roles
from jcrosslora.report.page.contents import contents_of as contents_of
from jcrosslora.report.page.contents import find_contents as find_contents
from jcrosslora.report.page.contents import parse_evaluation as parse_evaluation
from jcrosslora.report.page.headline import gain_share as gain_share
from jcrosslora.report.page.headline import headline as headline
from jcrosslora.report.page.html import answers_section as answers_section
from jcrosslora.report.page.html import report_page as report_page
