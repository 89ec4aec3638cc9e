"""How the bundled reference policy was made. The package never imports this."""
