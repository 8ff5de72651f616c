"""`pursuit` from the command line: the encoder beside pursuit of the same L0 and the best weights on its own latents."""

import pytest

SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("matching", "orthogonal")]


@pytest.mark.parametrize("method", ["gradient", *SLOW])
def test_pursuit_beside_the_encoder(finished, method):
    out, result, said = finished("pursuit", *(() if method == "gradient" else ("--method", method)))
    assert {path.name for path in out.iterdir()} == {"pursuit.json", "pursuit_widths.png", "report.html"}
    encoder = finished("decomposition").result
    for name in ("topk-24", "topk-48"):
        numbers = {v: result.numbers[f"{name} {v}/fvu"] for v in ("encoder", "pursuit", "refit")}
        assert numbers["encoder"] == pytest.approx(encoder.numbers[f"{name}/fvu"], rel=1e-6)
        assert numbers["refit"] <= numbers["encoder"] + 1e-9  # the best weights on the same latents
        assert result.numbers[f"{name} pursuit/l0"] <= result.numbers[f"{name} encoder/l0"] + 1e-9
    assert "topk-48 refit: FVU" in said
