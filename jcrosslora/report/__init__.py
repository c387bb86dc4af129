"""The report of a transfer: the record `TransferReport`, and the tables, model card, page and uploads made from it."""

from jcrosslora.report.documents import complete as complete
from jcrosslora.report.documents import documents as documents
from jcrosslora.report.documents import model_card as model_card
from jcrosslora.report.documents import published as published
from jcrosslora.report.record import REPORT as REPORT
from jcrosslora.report.record import Base as Base
from jcrosslora.report.record import TransferReport as TransferReport
from jcrosslora.report.record import Verdict as Verdict
from jcrosslora.report.record import read_report as read_report
from jcrosslora.report.record import shorten as shorten
from jcrosslora.report.table import print_report as print_report
from jcrosslora.report.table import verdict as verdict
