"""Which operators a model may use: the allowlist of the structural gate.

``ai.onnx`` and ``ai.onnx.ml`` are allowed as the installed ``onnx`` package defines them. Of ``com.microsoft`` only
what onnxruntime's own quantizer and transformer optimizer write, each a plain computation on its inputs; above all not
``EPContext``, which loads binaries for an accelerator.
"""

import onnx
import onnx.defs

__all__ = ["ALLOWED_DOMAINS", "ALLOWED_OPERATORS", "MAX_OPSET"]

_MICROSOFT = """
    Attention BiasAdd BiasGelu BiasSplitGelu ConvTransposeWithDynamicPads DequantizeLinear DynamicQuantizeLSTM
    DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul Gelu GemmaRotaryEmbedding
    GroupNorm GroupQueryAttention Inverse MatMulInteger16 MatMulIntegerToFloat MatMulNBits MultiHeadAttention NGramRepeatBlock
    NhwcMaxPool PackedAttention Pad QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool QLinearConcat
    QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax
    QLinearWhere QMoE QuantizeLinear QuickGelu RelativePositionBias RotaryEmbedding SkipGroupNorm SkipLayerNormalization
    SkipSimplifiedLayerNormalization SparseToDenseMatMul TransposeMatMul Trilu Unique
""".split()  # noqa: SIM905 -- a list of one word a line would be sixty lines

ALLOWED_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft"})  # "" is ai.onnx

ALLOWED_OPERATORS = frozenset(
    {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas() if schema.domain in {"", "ai.onnx.ml"}}
    | {("com.microsoft", name) for name in _MICROSOFT}
)

MAX_OPSET = {"": onnx.defs.onnx_opset_version(), "ai.onnx.ml": 5, "com.microsoft": 1}
