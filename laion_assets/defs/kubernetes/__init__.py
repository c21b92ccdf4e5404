"""Where steps run on a cluster: `placement` defines what pods request, `step_pods` starts them."""
