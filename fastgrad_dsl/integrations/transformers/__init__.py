"""Attention of fastgrad in models of Hugging Face's Transformers.

    from fastgrad_dsl.integrations import transformers as plugin
    plugin.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="fastgrad")
    plugin.calibrate(model, batches, output=0.01)

Transformers is imported by these functions, not by this module.
"""

from __future__ import annotations

from fastgrad_dsl.integrations.transformers.attach import NAME as NAME
from fastgrad_dsl.integrations.transformers.attach import attach as attach
from fastgrad_dsl.integrations.transformers.attach import register as register
from fastgrad_dsl.integrations.transformers.attach import status as status
from fastgrad_dsl.integrations.transformers.calibration import Calibrated as Calibrated
from fastgrad_dsl.integrations.transformers.calibration import calibrate as calibrate
from fastgrad_dsl.integrations.transformers.settings import Form as Form
from fastgrad_dsl.integrations.transformers.settings import Settings as Settings
