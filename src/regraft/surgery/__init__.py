"""Changes to models: cutting, re-fitting, adapters and factored layers. No other package changes a model."""
