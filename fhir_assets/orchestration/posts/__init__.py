"""The post loader, a process that loads posts over HTTP into the tables within seconds."""
