"""Load profiles for Locust: `locust -f loadtest/profiles/smoke.py --headless --host http://... --images FILE`.

Everyone sends real images, a share of them adversarial, as files, binary tensors or JSON. Each profile has limits;
Locust exits 1 where one is broken.
"""
