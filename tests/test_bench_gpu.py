"""The benchmark for accelerators runs, on what is here, and tells exact kernels from others."""

import bench_gpu
import pytest


@pytest.mark.full
def test_the_table_has_a_line_for_each_kernel(capsys):
    bench_gpu.main(["--small", "--kernels", "gram", "krylov"])
    kernels, fits = capsys.readouterr().out.split("a fit of bases of small")
    lines = kernels.splitlines()
    assert "TFLOP/s at HIGHEST" in lines[2]
    rows = {line[:24].strip(): line[24:].split() for line in lines if "gram" in line[:24] or "krylov" in line[:24]}
    wanted = [(f"{kernel} as it comes", f"decompose by {kernel}") for kernel in ("gram", "krylov")]
    assert list(rows) == [name for pair in wanted for name in pair]
    for name, (first, each, share, redone, loss, vectors, update, *used) in rows.items():
        assert float(first) >= 0
        assert float(each) > 0
        assert share.endswith("%")
        assert float(loss) < 1e-5
        assert used
        if name.startswith("decompose"):
            assert max(float(vectors), float(update)) < 1e-2
        else:
            assert redone == "0%"
    fitted = [line.strip("│ ").split("│") for line in fits.splitlines() if "│ small" in line]
    assert [row[1].strip() for row in fitted] == ["write", "read", "step"]
    assert all(float(measured) > float(paper) >= 0 for _, _, _, paper, measured, _ in fitted)
    hardware = [line.strip("| ").split(" | ") for line in fits.splitlines() if line.startswith("| small")]
    assert [row[-1] for row in hardware] == ["measured", "computed"]
    ours, paper = (float(row[3].split()[0]) for row in hardware)
    assert ours > paper > 0
