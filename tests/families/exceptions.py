"""Where a family deviates from the default path, and why."""

from __future__ import annotations

LENGTH = "a loop over time in Python"
IMAGES = "the number of images, or of their patches, is written into the graph"
WINDOWS = "windows or blocks of the sequence are counted in Python"

CAPTURED_AGAIN: dict[str, str] = {
    "recurrent_gemma": LENGTH,
    "minimax": LENGTH,
    "xlstm": LENGTH,
    "cpmant": WINDOWS,
    "canine": WINDOWS,
    "funnel": WINDOWS,
    "minimax_m3_vl_text": WINDOWS,
    "deberta": "the span of relative positions is cut at the sequence's length in Python",
    "smolvlm": IMAGES,
    "siglip2": IMAGES,
    "siglip2_vision_model": IMAGES,
}
"""Another shape is another capture, said in a warning."""

REFUSED: dict[str, str] = {
    "fsmt": "if not padding_mask.any()",
    "ibert": "assert x_max.isnan()",
    "lasr_ctc": "_ctc_loss",
    "longcat_flash": "for expert_idx_tensor in expert_hit",
    "parakeet_ctc": "_ctc_loss",
    "rwkv": "during forward (aten::div_)",
    "prophetnet": "assert torch.all(shifted_input_ids >= 0)",
    "qwen4_exp_text": "if num_complete_blocks > 0",
    "sew-d": "XSoftmax has a backward of its own",
    "yoso": "has a backward of its own",
}
"""``transform`` raises a CaptureError; a part of its text."""

MAMBA = "PEFT 0.21 refuses out_proj of Mamba models as a target"
UNHEARD = "another module reads the weight of a linear, past PEFT's adapter (said when it is saved)"
NO_PEFT: dict[str, str] = {
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "falcon_mamba": MAMBA,
    "falcon_h1": MAMBA,
    "nemotron_h": MAMBA,
    "deepseek_v4": "PEFT has no adapter for a linear in groups (o_a_proj)",
    "xlnet": "PEFT has no adapter for weights that are multiplied as [in, heads, size] (said when it is saved)",
    "aria": UNHEARD,
    "siglip": UNHEARD,
    "siglip2": UNHEARD,
    "wavlm": UNHEARD,
    "funnel": "as xlnet (r_kernel)",
    "laguna": "PEFT 0.21 does not load its own adapters of shared_experts: its renaming of shared_expert matches them",
    "mistral_large4": "as laguna: PEFT 0.21 does not load its own adapters of shared_experts",
    "dbrx": "PEFT's wrapper hides parameters that the experts read by name",
}
"""The saved adapter is not compared in PEFT."""

INNER = "calls generate of the decoder in it"
NOT_GENERATED = {
    "cpmant": "transformers' own tokens differ without its cache",
    "musicgen_decoder": "is generated from by a model around it",
    "whisper": "returns tokens without those that it begins with",
    "blip-2": INNER,
    "instructblip": INNER,
    "florence2": "calls its tower and its encoder one by one",
}
"""Models with a cache whose tokens are not compared; whisper is in test_generation_encoder_decoders."""
NO_CHECKPOINT: dict[str, str] = {}
"""The dense checkpoint is not loaded with ``from_pretrained``."""

SAID: dict[str, tuple[str, ...]] = {
    "gemma3n_text": ("changes a weight of its own", "the weight is computed"),
    "aimv2": ("unrecognised product",),
    "siglip2": ("unrecognised product", "the weight is computed"),
    "siglip2_vision_model": ("unrecognised product", "the weight is computed"),
    "deberta": ("the weight is computed",),
    "got_ocr2": ("unrecognised product", "the weight is computed"),
    "funnel": ("the weight is computed", "PEFT has no adapter"),
    "mobilebert": ("the weight is computed",),
    "inkling2_text": ("unrecognised product",),
    "smolvlm": (
        "Inductor cannot compile between",
    ),  # features of each picture, of sizes the data decide
    "zamba": ("unrecognised product",),
    "mllama": (
        "Inductor cannot compile prologue",
    ),  # its tiles are padded to a multiple of 8 patches
    # (h + 1) (w + 1) / (h + 1), which is not divided either
    "florence2": ("Inductor cannot compile Florence2VisionConvEmbed",),
    "audioflamingo3": ("Inductor cannot compile prologue",),  # it takes out what fills up sounds
    # c^2 / c for the rows c of a second block, which torch 2.13 does not divide
    "minimax": ("Exponent must be non-negative",),
}
"""Parts of warnings that belong to a family."""

ROUNDING: dict[str, float] = {"olmo3": 3e-4}
"""Relative error that a gradient may have where the usual limit is four times eager's own: its smallest nearly cancels
(norm 1e-4 beside 0.2) and was 4.03 times as far off as eager's, by sums in another order."""
