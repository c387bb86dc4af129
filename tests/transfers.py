"""Transfers from files to files, by the flat names of settings that commands and recipes have."""

from jcrosslora import TransferResult, TransferSettings, transfer_files

PLACES = ("adapter", "source", "target", "out")


def transfer_settings(*places, **settings) -> TransferSettings:
    return TransferSettings.of(**dict(zip(PLACES, map(str, places), strict=False)), **settings)


def move_files(*places, **settings) -> TransferResult:
    return transfer_files(transfer_settings(*places, **settings))
