"""Where steps run on a cluster: `placement` says what pods ask for, `step_pods` starts them."""
