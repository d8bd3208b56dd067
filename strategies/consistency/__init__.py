"""When replicas agree: how what they tell each other is coded, and when it arrives."""

from .callback import CodecHook
from .codecs import Codec, get_codec
from .hooks import CodecHookState, codec_hook

__all__ = ["Codec", "CodecHook", "CodecHookState", "codec_hook", "get_codec"]
