"""README.md of a model folder."""

from __future__ import annotations

import json

from ..config import config_as_dict


def card(title: str, text: str, config: object) -> str:
    """Front matter of the hub, the title, the text, and the settings of the run that made the model. The licence is for its
    owner to say."""
    return f"""---
library_name: diffusers
tags: [ldm_smd, latent-diffusion]
---
# {title}

{text}

```json
{json.dumps(config_as_dict(config), indent=2)}
```
"""
