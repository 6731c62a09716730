"""Four published defences against adversarial examples: a study, and the library it is made with.

`import afgstudy` imports nothing else; `afgstudy.attacks` imports that room when it is first named (PEP 562).
"""

__version__ = "0.1.0"


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
