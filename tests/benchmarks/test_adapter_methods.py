"""The benchmark of adapters' scores."""

import adapter_methods


def test_every_method_is_trained_on_the_same_rows(start, tmp_path):
    words = ["--quick", "--keep", tmp_path, "--methods", "adapter_8", "norms", "lora", "full"]
    result, shown = start(adapter_methods, *words)
    found = result["tasks"]["movie_reviews"]
    counts = {method: one["trainable_parameters"] for method, one in found["methods"].items()}
    assert counts["adapter_8"] < counts["norms"]
    assert counts["full"] == found["total_parameters"]
    assert found["rows"] == adapter_methods.QUICK["rows"]
    assert "adapters, m = 64, and layer norms" in shown
    assert (tmp_path / "adapter_methods.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*full*/model*.safetensors"))
