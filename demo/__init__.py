"""A web page to try a trained model on."""

import os
import re

from model.edge import exits

with exits():  # gradio reads these when it is imported or started, and would raise a traceback
    for name, value in os.environ.items():
        number = re.fullmatch("GRADIO_.*(PORTS?|WORKERS|DEBUG)", name)
        if number and not value.isdecimal():
            raise ValueError(f"demo: {name} must be a whole number, got {value!r}; gradio reads it")
