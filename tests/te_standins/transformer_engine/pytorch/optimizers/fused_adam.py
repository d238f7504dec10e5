import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *, bias_correction=True, adam_w_mode=True,
        capturable=False, master_weights=False, master_weight_dtype=torch.float32, exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32, use_decoupled_grad=False, store_param_remainders=False, set_grad_none=None,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode, self.capturable, self.master_weights = int(adam_w_mode), capturable, master_weights
        self.master_weight_dtype, self.exp_avg_dtype, self.exp_avg_sq_dtype = master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype
        self.use_decoupled_grad, self.store_param_remainders = use_decoupled_grad, store_param_remainders

    def _state_of(self, p):
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros(p.shape, dtype=self.exp_avg_dtype, device=p.device)
            state["exp_avg_sq"] = torch.zeros(p.shape, dtype=self.exp_avg_sq_dtype, device=p.device)
        return state

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            corrections = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
            for p in group["params"]:
                grad = getattr(p, "decoupled_grad", None) if self.use_decoupled_grad else p.grad
                if grad is None:
                    continue
                state, grad = self._state_of(p), grad.float()
                first = beta1 * state["exp_avg"].float() + (1 - beta1) * grad
                second = beta2 * state["exp_avg_sq"].float() + (1 - beta2) * grad * grad
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)
                update = (first / corrections[0]) / ((second / corrections[1]).sqrt() + group["eps"]) + group["weight_decay"] * p.float()
                p.copy_(p.float() - group["lr"] * update)


class FusedSGD(torch.optim.SGD):
    pass
