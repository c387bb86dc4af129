"""The estimate of a fit on accelerators, on paper and run where it is."""

import argparse

import fit_sizes
import jax
import jax.numpy as jnp
import pytest
from roofline import SHARE, SHARE_READ, Device

from jcrosslora.decoder import load_model


def rows_of(capsys):
    return [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if "small" in line]


@pytest.mark.full
def test_a_line_for_each_program_on_paper_and_measured(capsys):
    fit_sizes.main(["--small", "--run", "--prompt", "16", "--answer", "8"])
    rows = rows_of(capsys)
    assert [row[1].strip() for row in rows[1:]] == ["write", "read", "step"]
    for _, _, times, paper, measured, whole in rows[1:]:
        assert float(measured) > float(paper) >= 0
        assert abs(float(whole) - int(times) * float(measured)) <= 0.06 + 5e-5 * int(times)


def test_fits_at_once_save_what_is_read_and_no_operation():
    arguments = argparse.Namespace(prompt=96, answer=32, prompts=300)
    reads, computes = Device(1e9, 1.0, 80, 1.0), Device(1.0, 1e9, 80, 1.0)
    ratios = [
        fit_sizes.whole_fit("1B", 1, arguments, device, 8) / fit_sizes.whole_fit("1B", 1, arguments, device)
        for device in (reads, computes)
    ]
    assert ratios == pytest.approx([1, 8])


def test_shapes_are_those_of_the_loaded_weights():
    loaded = jax.eval_shape(lambda: load_model(fit_sizes.empty_base("small"), jnp.bfloat16))
    assert fit_sizes.shapes_of("small") == loaded


@pytest.mark.full
def test_two_devices_have_half_of_the_matrices_each():
    arguments = argparse.Namespace(prompt=16, answer=8)
    (_, _, one), (_, _, two) = fit_sizes.memory_rows(["small"], [1, 2], arguments)
    matrices = 2 * (2 * (4 + 2 + 2 + 4) * 16 * 64 + 2 * 3 * 64 * 128 + 7000 * 64) * 2
    assert one[0] - two[0] == matrices / 2
    assert all(0 < divided < whole for whole, divided in zip(one[1:], two[1:], strict=True))


def test_a_device_computes_or_reads_and_sends_behind_it():
    device = Device(rate=10, bandwidth=2, memory=1, link=0.1)
    computing, reading = 1e12 / (SHARE * 10e12), 1e12 / (SHARE_READ * 2e12)
    assert device.seconds(1e12, 0) == pytest.approx(computing)
    assert device.seconds(1e12, 1e12) == pytest.approx(max(computing, reading))
    assert device.seconds(1e12, 1e12, 1e9, devices=2) == pytest.approx(reading / 2 + 1e9 / (SHARE_READ * 0.1e12))


def test_weights_of_zeros_have_the_size_of_their_shape():
    base = fit_sizes.empty_base("1B")
    weights = sum(rows * columns for rows, columns in (module.shape for module in base.modules.values()))
    assert weights == 973_078_528
