import torch


class FusedAdam(torch.optim.AdamW):
    """Its states and formula are AdamW's; its constructor's names are its own."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, amsgrad=False, **_
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


class FusedSGD(torch.optim.SGD):
    pass
