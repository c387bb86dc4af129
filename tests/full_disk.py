"""A disk that is full, as Orbax reports it."""

import logging

import orbax.checkpoint as ocp


def fill_disk(monkeypatch, after: int = 0) -> None:
    """Let Orbax keep some states, and fail with each that follows: its storage raises a ValueError, and logs it."""
    save, saved = ocp.CheckpointManager.save, []

    def full(manager, step, *given, **named):
        if len(saved) < after:
            saved.append(step)
            return save(manager, step, *given, **named)
        (manager.directory / f"{step}.orbax-checkpoint-tmp").mkdir()
        logging.getLogger("absl").error("a thread failed")
        msg = 'RESOURCE_EXHAUSTED: Error writing "x": Failed to write 9 bytes: No space left on device\n'
        raise ValueError(msg + "[tensorstore_spec='{}'] [os_error_code='28']")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
