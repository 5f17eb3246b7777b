_base_ = 'byol_resnet50_8xb32-accum16-coslr-200e_in1k.py'
data = dict(samples_per_gpu=256)
custom_hooks = [dict(type='BYOLHook', end_momentum=1., update_interval=1)]
optimizer_config = dict(_delete_=True)
