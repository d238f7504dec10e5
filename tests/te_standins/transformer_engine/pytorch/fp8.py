import contextlib


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, **_):
    yield


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, **_):
    yield
