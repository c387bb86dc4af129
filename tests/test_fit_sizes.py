"""The estimate of a fit on accelerators, on paper and run where it is."""

import fit_sizes


def test_a_line_for_each_program_on_paper_and_measured(capsys):
    fit_sizes.main(["--small", "--run", "--prompt", "16", "--answer", "8"])
    rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if "small" in line]
    assert [row[1].strip() for row in rows[1:]] == ["write", "read", "step"]
    for _, _, times, paper, measured, whole in rows[1:]:
        assert float(measured) > float(paper) >= 0
        assert abs(float(whole) - int(times) * float(measured)) <= 0.06 + 5e-5 * int(times)


def test_weights_of_zeros_have_the_size_of_their_shape():
    base = fit_sizes.empty_base("1B")
    weights = sum(rows * columns for rows, columns in (module.shape for module in base.modules.values()))
    assert weights == 973_078_528
