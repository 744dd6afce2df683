"""A web page to try a trained model on."""

import os

from model.edge import exits

with exits():
    try:
        import gradio  # noqa: F401 # here, before any file of ours does
    except ValueError as error:  # it reads numbers out of the environment
        given = (f"{name}={value}" for name, value in os.environ.items() if "GRADIO_" in name)
        raise ValueError(f"demo: gradio cannot read {', '.join(given)}: {error}") from None
