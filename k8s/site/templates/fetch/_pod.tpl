{{/* The one pod with a way to the hub. It holds no identity, and of the site's data only what it fetches itself. */}}
{{- define "site.fetchPod" -}}
metadata:
  labels:
    {{- include "site.podLabels" (list . "fetch") | nindent 4 }}
spec:
  {{- include "site.pod" (list . (printf "%s-fetch" (include "site.fullname" .))) | nindent 2 }}
  enableServiceLinks: false
  restartPolicy: OnFailure
  {{- with include "site.scheduling" (pick .Values.app "nodeSelector" "tolerations" "priorityClassName") | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  affinity:
    {{- include "site.affinityToApp" (list . dict) | nindent 4 }}
  containers:
    - name: fetch
      {{- include "site.container" (list . .Values.app.image) | nindent 6 }}
      command: [/bin/sh, /scripts/fetch.sh]
      args:
        {{- include "site.fetchArguments" . | nindent 8 }}
      env:
        - {name: HF_HUB_OFFLINE, value: "0"}
        - {name: HF_HUB_CACHE, value: /fetched/models}
        {{- with .Values.hub.existingSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ . | quote }}, key: HF_TOKEN}
        {{- end }}
      resources:
        requests: {cpu: 500m, memory: 1Gi}
        limits: {memory: 2Gi, ephemeral-storage: 2Gi}
      volumeMounts:
        - {name: hub, mountPath: /fetched}
        - {name: scripts, mountPath: /scripts, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/vlafleet}
  volumes:
    - name: hub
      persistentVolumeClaim:
        claimName: {{ include "site.claimName" (list . "hub" .Values.app.persistence.hub) | quote }}
    {{- include "site.scriptsVolume" . | nindent 4 }}
    {{- include "site.scratch" (list "512Mi" "1Gi") | nindent 4 }}
{{- end }}
