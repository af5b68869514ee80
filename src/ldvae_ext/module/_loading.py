"""Loading of parameters that is strict about batch norms too."""

from __future__ import annotations

from typing import Any

from ldvae_ext._validate import listed


class StrictLoading:
    """Stands before a network of scvi-tools, whose layers hold None where they have no batch norm.

    torch ignores saved parameters that do not exist, so that a network with other options would load without an error.
    """

    def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch; strict means that the network has all that was saved.

        Parameters
        ----------
        state_dict, strict, assign
            As in ``torch.nn.Module``.

        Raises
        ------
        RuntimeError
            If the parameters belong to another network.
        """
        unknown = sorted(set(state_dict) - set(self.state_dict())) if strict else []
        if unknown:
            msg = f"This network has no {listed(unknown)}: it was saved with other options."
            raise RuntimeError(msg)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
