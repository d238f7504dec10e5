import torch


def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", interleaved=False, fused=True, cu_seqlens=None, cp_size=1, cp_rank=0, **_):
    """t [s, b, h, d], freqs [s, 1, 1, d']: computed in float32 and rounded once, as the fused kernel does; element by element."""
    width = freqs.shape[-1]
    rotated, rest = t[..., :width], t[..., width:]
    if interleaved:
        half = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        half = torch.cat((-second, first), -1)
    angles = freqs[: len(t)]
    turned = rotated.float() * angles.cos() + half.float() * angles.sin()
    return torch.cat((turned.to(t.dtype), rest), -1)
