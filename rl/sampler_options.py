"""Options of who samples the rollouts, and how it is given the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from internvl.errors import UserError

SAMPLERS = ("auto", "vllm", "server", "transformers")
_OF_SERVERS: dict[str, object] = {"server_model": None, "server_weights_dir": None}
_OF_SERVERS |= {"server_timeout": 600.0, "server_patience": 300.0, "max_staleness": 0}


@dataclass
class SamplerOptions:
    """Options of the online stage's sampler; names are TRL's or those of `mmpr sample`."""

    sampler: str = field(
        default="auto",
        metadata={
            "help": "'vllm' (in this process), 'server' (any number of vLLM servers), "
            "'transformers', or 'auto': vLLM where it is."
        },
    )
    server: list[str] | None = field(
        default=None,
        metadata={
            "help": "http://host:8000/v1 of each vLLM server; it serves model_name_or_path with "
            "VLLM_SERVER_DEV_MODE=1, --trust-request-mm-kwargs and "
            "--logprobs-mode processed_logprobs, on a private network."
        },
    )
    server_model: str | None = field(
        default=None, metadata={"help": "The model's name there, where servers offer several."}
    )
    server_weights_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder that the servers see under the same path, for the weights on their "
            "way; by default output_dir/weights."
        },
    )
    server_timeout: float = field(default=600.0, metadata={"help": "Seconds for one request."})
    server_patience: float = field(
        default=300.0, metadata={"help": "Seconds to go on while no server answers."}
    )
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "Rollout batches that a completion's weights may be behind. 0 samples from "
            "the current ones; 1 samples the next batch on the servers while this one is "
            "trained on."
        },
    )
    lora_sync: str = field(
        default="auto",
        metadata={
            "help": "How a LoRA reaches vLLM: 'adapter' (by itself: little to send, slower to "
            "decode with), 'merged', or 'auto': by itself where vLLM is in this process."
        },
    )
    canary_questions: int = field(
        default=4,
        metadata={
            "help": "Questions whose fixed completions are scored by trainer and sampler after "
            "each update of the sampler's weights; 0: off."
        },
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "vLLM in this process gives the GPU's memory back while training."},
    )
    vllm_gpu_memory_utilization: float | None = field(
        default=None,
        metadata={
            "help": "Share of a GPU that vLLM may fill beside the trainer, its weights included "
            "(0.3 is a start); by default vLLM's own, which leaves the trainer little."
        },
    )
    max_logprob_gap: float | None = field(
        default=None,
        metadata={
            "help": "Stop when sampler and trainer differ by more than this in the log-probability "
            "of a token, sampled or the canary's (float32: 1e-4 holds). By default sampled ones "
            "are only logged, and the canary's bound is 0.01 in float32 and 1 in 16 bits."
        },
    )

    @property
    def uses_servers(self) -> bool:
        """Whether the rollouts come from servers."""
        return self.sampler == "server" or (self.sampler == "auto" and bool(self.server))

    def check_sampler_options(self) -> None:
        """Raise `UserError` for options that cannot be honoured, or that nothing would read."""
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler is {self.sampler!r}: one of {', '.join(SAMPLERS)}")
        if self.sampler == "server" and not self.server:
            raise UserError("sampler is 'server', but server names none: http://host:8000/v1")
        if self.server and not self.uses_servers:
            raise UserError(f"server is given, but sampler is {self.sampler!r}")
        if self.max_staleness not in (0, 1):
            raise UserError(
                f"max_staleness is {self.max_staleness}; 0 or 1: sampling one batch ahead is all "
                "that overlaps, more would only be staler"
            )
        for option, default in _OF_SERVERS.items():
            if not self.uses_servers and getattr(self, option) != default:
                raise UserError(f"{option} is given, but rollouts are not sampled by servers")
        if self.server_timeout <= 0 or self.server_patience < 0:
            raise UserError("server_timeout and server_patience are seconds, above 0")
        if self.lora_sync not in ("auto", "adapter", "merged"):
            raise UserError(f"lora_sync is {self.lora_sync!r}: 'auto', 'adapter' or 'merged'")
        if self.lora_sync == "adapter" and self.sampler == "transformers":
            raise UserError("lora_sync is 'adapter', which transformers as a sampler cannot take")
        if self.canary_questions < 0:
            raise UserError(f"canary_questions is {self.canary_questions}, 0 or more")
        if self.vllm_enable_sleep_mode and (self.uses_servers or self.sampler == "transformers"):
            raise UserError("vllm_enable_sleep_mode is of vLLM in this process")
