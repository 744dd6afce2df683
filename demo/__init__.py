"""A web page to try a trained model on."""

import os
import re

from model.edge import exits

with exits():  # before gradio reads them, some at its import and some when the page starts
    for name, value in os.environ.items():
        number = re.fullmatch("GRADIO_.*(PORTS?|WORKERS|DEBUG)", name)
        if number and not value.isdecimal():
            raise ValueError(f"demo: {name} must be a whole number, got {value!r}; gradio reads it")
