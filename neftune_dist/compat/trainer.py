"""The list of callbacks in transformers' `Trainer`. Checked against 5.17.0 and 5.23.0.

Apart from `compat.transformers`, because importing the trainer imports accelerate and PEFT.
"""

from __future__ import annotations

import inspect

from transformers.trainer_callback import CallbackHandler, TrainerCallback


def call_first(callback: TrainerCallback) -> None:
    """From within an event of a trainer: let a callback be called before the others.

    A trainer puts a user's callbacks after those that report to W&B, TensorBoard and the like, so
    that what they add to the logs would be reported by none. It hands no callback the list that
    they are called from, which is found on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # A new list: the handler is iterating over the old one.
            others = [other for other in handler.callbacks if other is not callback]
            handler.callbacks = [callback, *others]
            return
        frame = frame.f_back
