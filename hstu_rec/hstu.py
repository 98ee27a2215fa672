"""HSTU: the model alone, on padded tensors in one process, for whoever knows the published API."""

import torch
from torch import Tensor, nn

from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig


class HSTU(nn.Module):
    """Next-item logits over items 1..num_items from padded histories.

    The scores are dot products of the encoder's output with the item embedding (tied).
    """

    def __init__(
        self,
        num_items: int,
        hidden_dim: int = 64,
        num_heads: int = 2,
        num_layers: int = 2,
        max_seq_len: int = 50,
        dropout: float = 0.2,
        use_temporal_bias: bool = True,
    ) -> None:
        super().__init__()
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1; got {num_items}")
        self.num_items = num_items
        self.item_embedding = nn.Embedding(num_items + 1, hidden_dim)
        nn.init.normal_(self.item_embedding.weight, std=0.02)
        self.encoder = HSTUEncoder(
            EncoderConfig(
                dim=hidden_dim,
                num_heads=num_heads,
                num_layers=num_layers,
                max_history_len=max_seq_len,
                dropout=dropout,
                use_time_bias=use_temporal_bias,
                final_norm="rms",
            )
        )

    def forward(
        self, item_ids: Tensor, timestamps: Tensor | None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L, num_items + 1]; column 0 is -inf, rows of padding are 0 but for that column.

        Args:
            item_ids: int64 [B, L], 0 = padding (left or right), items 1..num_items.
            timestamps: int64 [B, L] in s; may be None without `use_temporal_bias`.
            attention_mask: bool [B, L], true at real events; `item_ids != 0` when None.
        """
        is_event = item_ids != 0 if attention_mask is None else attention_mask.bool()
        ids = item_ids[is_event]
        outside = ids[(ids < 1) | (ids > self.num_items)]
        if len(outside):
            raise ValueError(
                f"{len(outside)} item ids are outside 1..{self.num_items}, for example "
                f"{outside[:5].tolist()}; mask padding out and map unknown items first"
            )
        lengths = is_event.sum(1)
        if int(lengths.max()) > self.encoder.config.max_history_len:
            raise ValueError(
                f"a history has {int(lengths.max())} events, max_seq_len is "
                f"{self.encoder.config.max_history_len}; keep the newest"
            )
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        times = None if timestamps is None else timestamps[is_event]
        encoded = self.encoder(self.item_embedding(ids), offsets, times)
        padded = encoded.new_zeros(*item_ids.shape, encoded.shape[-1])
        padded[is_event] = encoded
        logits = padded @ self.item_embedding.weight.T
        logits[..., 0] = -torch.inf
        return logits
