"""Makes Triton's interpreter faster. Results are the same."""

from __future__ import annotations

from functools import cache


def patch() -> None:
    """Skips work that the interpreter repeats. Without effect on a Triton whose functions have other names."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "_get_np_dtype")):
        return
    patch_language, scope = interpreter._patch_lang, interpreter._LangPatchScope
    numpy_type, scalar_type = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def patch_once(function):
        """The interpreter replaces the functions of triton.language at each call of an inner function, not only at a
        launch."""
        seen = function.__globals__.values()
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core) if language in seen):
            return patch_language(function)
        return scope()

    interpreter._patch_lang = patch_once
    # Builds a table at each call.
    interpreter._get_np_dtype = lambda kind: numpy_type(kind) if kind.scalar.is_ptr() else scalar_type(kind.scalar)
