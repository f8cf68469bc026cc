"""The post loader: loads what is posted over HTTP within seconds, in a process that is up."""
