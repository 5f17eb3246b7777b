_base_ = 'deepcluster_resnet50_8xb64-steplr-200e_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='ResNetSobel', depth=50, out_indices=[4], norm_cfg=dict(type='BN')))
