"""Who asks: API keys, tenants, and how much each may take."""
