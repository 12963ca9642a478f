"""Which versions a result depends on."""

from recipelib.runtime.installed import versions


def test_versions_are_those_of_the_imported_libraries():
    import platform

    import torch

    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"transformers", "trl", "peft", "accelerate", "datasets", "evaluate"} < set(found)


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    import importlib.metadata as metadata

    real = metadata.version

    def version(name):
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "trl" not in versions()
    assert "torch" in versions()
