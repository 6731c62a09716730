"""Four published defences against adversarial examples: a study, and the library it is made with.

`import afgstudy` imports nothing else; `afgstudy.attacks` imports that room when it is first named (PEP 562).
"""

import sys

__version__ = "0.2.0"

EXTRAS = {  # what an extra brings -> its name, as settings.ini has it
    **dict.fromkeys(("foolbox", "eagerpy", "pyautoattack"), "attacks"),
    **dict.fromkeys(("matplotlib", "seaborn", "captum"), "plots"),
    **dict.fromkeys(("statsmodels", "pandas", "papermill", "nbformat", "nbconvert", "jupyter_client"), "study"),
    **dict.fromkeys(("ipykernel", "IPython", "click", "yaml", "jinja2", "markupsafe", "jsonschema"), "study"),
    **{"ray": "ray", "distributed": "dask", "huggingface_hub": "hub"},
}


class _Extras:
    """Asked last of all, so only for what is not installed: names the extra that brings it.

    Only imports made by this package's own modules are answered; others fail as they always do.
    """

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        frame = sys._getframe(1)
        while frame and frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib")):
            frame = frame.f_back
        asking = frame.f_globals.get("__name__", "") if frame else ""
        if name in EXTRAS and asking.startswith("afgstudy."):
            extra = f"pip install 'afgstudy[{EXTRAS[name]}]'"
            raise ModuleNotFoundError(f"{asking} needs {name}, which is not installed: {extra}", name=name)


sys.meta_path.append(_Extras)


def _rooms() -> set[str]:
    import pkgutil

    return {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}


def __getattr__(name: str):
    if name in _rooms():
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_rooms()})
