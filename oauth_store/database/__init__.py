"""Three tables, and access to them. Nothing here knows a flow or HTTP."""
